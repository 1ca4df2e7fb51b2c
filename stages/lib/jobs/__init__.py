"""What a batch service is given: the specs of jobs, what they must hold, and copies to and from its volumes."""

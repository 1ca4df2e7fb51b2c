"""Where rows come from, what a conversation is, how it becomes token ids and a mask."""

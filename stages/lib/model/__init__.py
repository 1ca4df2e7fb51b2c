"""The base model, its precision, the adapter, the loss and the training loop."""

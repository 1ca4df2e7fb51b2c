"""The base model, its precision, the adapter, the loss and the training loop."""

from stages.lib.run import settings

settings.keep_compiled()  # before bitsandbytes is imported: it compiles, and takes a temporary folder for all

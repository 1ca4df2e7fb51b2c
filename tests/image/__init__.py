"""The image, built and run on a real engine: `make image-test`."""

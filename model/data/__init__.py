"""Dataset tables, image decoding, augmentation and the loaders that turn them into batches."""

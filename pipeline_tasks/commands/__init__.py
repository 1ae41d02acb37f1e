"""Commands around the pipeline, a module each: what argparse needs to know, and what the command does."""

"""The steps of the Nasline pipeline, each a command (`nasline STEP`) over one public function."""

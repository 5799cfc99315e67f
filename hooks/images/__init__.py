"""Images: which they are, how they are read, decoded and preprocessed."""

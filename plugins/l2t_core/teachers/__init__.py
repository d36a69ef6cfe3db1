"""Who writes the loss: the networks, their files, and a trained one that follows a student."""

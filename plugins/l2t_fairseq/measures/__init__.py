"""What a translation is worth: candidates, their law, and their scores."""

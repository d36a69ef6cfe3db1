"""What a student descends: the losses that phi writes, and the fixed ones beside them."""

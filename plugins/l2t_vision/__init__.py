"""Image tasks: data, models and the student that the teacher core trains."""

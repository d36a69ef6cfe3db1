"""From a student's life to d M-tilde / d theta: there, back, and all that it takes."""

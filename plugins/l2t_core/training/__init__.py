"""Algorithm 1: episodes, updates of theta, and what is kept between them."""

"""Messages on the links between peers, and the strict codec for them."""

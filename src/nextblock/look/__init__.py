"""What a user asks to see: a model from anywhere, images from anywhere, a picture and its numbers."""

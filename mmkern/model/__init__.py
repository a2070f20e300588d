"""The thin multimodal encoder-decoder: text and images in, text and classes out."""

"""Text encoders: CLIP's and BERT's."""

"""Model families, the Siamese encoder, and Hugging Face folders read and written."""

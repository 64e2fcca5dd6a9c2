"""Workers train what they are handed; engines host them; a small protocol lies between."""

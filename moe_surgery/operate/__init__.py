"""Planning the operation, carrying it out as one transaction, and taking it back."""

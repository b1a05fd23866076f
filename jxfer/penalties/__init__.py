"""What a method adds to the loss."""

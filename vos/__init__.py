"""What the scripts on top share. A contestant need not open it."""

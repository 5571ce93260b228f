"""What testing a pack needs: tiny real models of every family."""

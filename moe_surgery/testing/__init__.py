"""What testing a pack needs: tiny real models of every family, and a test case for packs of one's own."""

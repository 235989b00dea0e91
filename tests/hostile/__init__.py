"""What an enrolled node, or anyone who reaches the port, tries against a server that runs."""

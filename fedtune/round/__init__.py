"""One round: the server's machine, the client's machine, the journal. No network, no clock."""

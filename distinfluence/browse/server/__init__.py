"""The server of the page: sockets, questions, and the link that opens it."""

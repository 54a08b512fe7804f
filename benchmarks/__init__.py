"""What the library claims about speed, memory and traffic; each claim is a command."""

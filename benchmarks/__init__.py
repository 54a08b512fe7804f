"""Programs that measure the library's speed, memory and traffic: one command for each claim."""

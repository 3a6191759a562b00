"""Commands that start no engine, and the console that all of them speak to."""

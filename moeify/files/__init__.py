"""Files in and out: what is read is checked and has limits, what is written appears whole or not at all."""

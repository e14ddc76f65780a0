"""What packets hold, from their headers: which pictures a decoder needs, and how many it decodes and shows."""

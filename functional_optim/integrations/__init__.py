"""Connect frameworks to this library; each is imported only where it is used."""

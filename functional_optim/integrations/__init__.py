"""Connect frameworks to this library, each imported only by who asks for it."""

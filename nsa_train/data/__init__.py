"""From text to packed batches: `prepare` tokenises a corpus once, `TokenStore` opens it, `Loader` gives batches."""

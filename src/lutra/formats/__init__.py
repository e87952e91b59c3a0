"""What is on disk: pack, unpack (the oracle) and measured bits, one module per format."""

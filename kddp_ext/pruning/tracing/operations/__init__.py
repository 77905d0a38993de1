"""What the operations of a forward pass do to the labels of neurons."""

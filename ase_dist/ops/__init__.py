"""The maths of a layer by device: products, low-rank linears and FFNs with hand-written autograd, autocast."""

"""One model process for each device of this machine (`worker --devices`), and the process that hands clients to them."""

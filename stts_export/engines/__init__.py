"""Back ends: what turns a graph into something that runs. One module each, same shape."""

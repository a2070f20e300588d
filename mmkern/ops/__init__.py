"""Public ops: argument checks, schema, fake, autograd, choice of backend. One file per op."""

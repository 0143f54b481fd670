"""The operations: one file each, with the checks, schema, fake, autograd and vmap of that operation, and no arithmetic."""

"""The operations, one file each: the checks, schema, fake, autograd and vmap of that operation, and no arithmetic."""

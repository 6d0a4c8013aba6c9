"""How the values at the support move."""

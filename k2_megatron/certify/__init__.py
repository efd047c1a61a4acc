"""Whether two layouts compute the same steps: recorded, compared with what rounding alone does, and certified."""

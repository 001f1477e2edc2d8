"""A log of what a server or a site did, signed by it, in which nothing can be changed unnoticed."""

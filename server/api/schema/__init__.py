"""What /openapi.json and /docs show of the routes, read off them."""

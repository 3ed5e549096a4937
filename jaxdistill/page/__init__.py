"""The page that draws while one types: its engine, its server and the files of the browser."""

"""Every SQL statement of the product, one function each, one module for each noun.

Functions take a SQLAlchemy connection first. They run in autocommit unless the caller has opened `transaction`.
"""

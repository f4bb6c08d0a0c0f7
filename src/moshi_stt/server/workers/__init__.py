"""The processes that carry WebSockets for the main one, which has the model."""

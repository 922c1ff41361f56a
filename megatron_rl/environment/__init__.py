"""What answers the model from outside the engine: the gateway for agents, and the programs that are agents."""

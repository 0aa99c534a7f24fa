"""What tests share: runs, models, data, oracles. Test files import from here, never from one another."""

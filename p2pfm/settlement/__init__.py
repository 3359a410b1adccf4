"""From contributions to money: rewards tree, ledger, signatures of the committee."""

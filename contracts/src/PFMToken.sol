// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @title The reward token: fixed supply, no owner, no minting after deployment.
contract PFMToken is ERC20 {
    /// @param holder receives the whole supply
    /// @param supply [wei, 10**-18 PFM]; it never changes
    constructor(address holder, uint256 supply) ERC20("p2pfm", "PFM") {
        _mint(holder, supply);
    }
}
